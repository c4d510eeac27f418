/* The look at every warp that precedes each step of the scheduler (scheduler.py), which is small and frequent enough for
 * the calls of a dozen NumPy functions to cost more than what the step does. It is no Python extension module: it is
 * loaded with ctypes, and works on the arrays of a Machine where they lie.
 */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { NOBODY_READY = -1, EVERYBODY_EXITED = -2 };

/* Warps of a wave, `count` in all. `chosen` and the last three members are results. */
typedef struct {
    const int32_t *pc;       /* block at which each stands; `end` once it has exited */
    const int32_t *stalled;  /* block whose wait failed: it sleeps while it stands there */
    const uint8_t *barred;   /* it waits at a barrier */
    const uint8_t *diverged; /* its lanes stand at different blocks */
    const int64_t *last_run; /* step at which it last ran */
    uint8_t *chosen;         /* it runs now */
    int64_t count;
    int32_t end;
    int32_t turn;   /* the warp that has waited longest chooses the block, else the lowest block is chosen */
    int32_t lowest; /* block of the ready warps that are not chosen, `end` if there are none */
    int32_t apart;  /* chosen warps that have diverged */
} warps_t;

/* Choose a block and the ready warps that stand there. Returns the block, NOBODY_READY or EVERYBODY_EXITED. */
EXPORT int32_t choose_block(warps_t *w) {
    const int32_t end = w->end;
    int32_t block = end;
    int64_t oldest = INT64_MAX, running = 0;
    for (int64_t i = 0; i < w->count; i++) {
        const int32_t pc = w->pc[i];
        const uint8_t ready = pc != end && !w->barred[i] && w->stalled[i] != pc;
        running += pc != end;
        w->chosen[i] = ready;
        if (!ready) continue;
        if (!w->turn) {
            if (pc < block) block = pc;
        } else if (w->last_run[i] < oldest) {
            oldest = w->last_run[i];
            block = pc;
        }
    }
    if (block == end) return running ? NOBODY_READY : EVERYBODY_EXITED;
    w->lowest = end;
    w->apart = 0;
    for (int64_t i = 0; i < w->count; i++) {
        if (!w->chosen[i]) continue;
        const int32_t pc = w->pc[i];
        if (pc == block) {
            w->apart += w->diverged[i];
        } else {
            w->chosen[i] = 0;
            if (pc < w->lowest) w->lowest = pc;
        }
    }
    return block;
}
