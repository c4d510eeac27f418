/* A stand-in for the CuTe DSL's runtime library, for machines with no GPU and no CUDA driver.
 *
 * The DSL's compiled host function calls its runtime through the C symbols listed below. This library has all of them
 * under the prefix `emulated_` (host.py redirects the host function's undefined symbols to these names, so that this
 * library and the DSL's own can serve different kernels in one process, in whatever order they are loaded). Each call
 * is handed, as a symbol index and its integer arguments, to one dispatcher that Python installs. The library decides
 * nothing itself and links against nothing but libc. It is no Python extension module: it is loaded with ctypes.
 *
 * A call that arrives while no dispatcher is installed fails with cudaErrorNotSupported; it never succeeds silently.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define CUDA_ERROR_NOT_SUPPORTED 801
#define HOST_VERSION 1 /* raised with every change of this file, here and in host.py: test_host.py knows the text of each */

/* Functions of which every argument fits an integer register or an eight-byte stack slot. Twelve covers the longest
 * signature (cuTensorMapEncodeTiled); reading past the arguments that a caller passed yields arbitrary values, which
 * the dispatcher for that symbol does not look at. */
#define HOST_SYMBOLS(X)                                                                                               \
    X(_cuDeviceGet) X(_cuKernelGetAttribute) X(_cuLibraryGetGlobal) X(_cuLibraryGetKernel)                            \
    X(_cuLibraryGetKernelCount) X(_cuLibraryGetManaged) X(_cuLibraryGetModule) X(_cuLibraryGetUnifiedFunction)        \
    X(_cuLibraryLoadData) X(_cuLibraryLoadFromFile) X(_cuLibraryUnload) X(_cuTensorMapEncodeTiled)                    \
    X(_cudaDeviceGetAttribute) X(_cudaDeviceSynchronize) X(_cudaEventCreate) X(_cudaEventDestroy)                     \
    X(_cudaEventElapsedTime) X(_cudaEventRecord) X(_cudaFree) X(_cudaFreeAsync) X(_cudaFreeHost)                      \
    X(_cudaFuncSetAttribute) X(_cudaGetDevice) X(_cudaGetDeviceCount) X(_cudaGetDeviceProperties)                     \
    X(_cudaGraphDestroy) X(_cudaGraphExecDestroy) X(_cudaGraphInstantiate) X(_cudaGraphLaunch)                        \
    X(_cudaKernelSetAttributeForDevice) X(_cudaLaunchKernel) X(_cudaLaunchKernelEx) X(_cudaLibraryGetGlobal)          \
    X(_cudaLibraryGetKernel) X(_cudaLibraryGetKernelCount) X(_cudaLibraryGetManaged)                                  \
    X(_cudaLibraryGetUnifiedFunction) X(_cudaLibraryLoadData) X(_cudaLibraryLoadFromFile) X(_cudaLibraryUnload)       \
    X(_cudaMalloc) X(_cudaMallocAsync) X(_cudaMallocHost) X(_cudaMallocManaged) X(_cudaMemcpy) X(_cudaMemcpyAsync)    \
    X(_cudaMemset) X(_cudaMemsetAsync) X(_cudaOccupancyMaxActiveBlocksPerMultiprocessor) X(_cudaProfilerStart)        \
    X(_cudaProfilerStop) X(_cudaSetDevice) X(_cudaStreamAddCallback) X(_cudaStreamBeginCapture) X(_cudaStreamCreate)  \
    X(_cudaStreamDestroy) X(_cudaStreamEndCapture) X(_cudaStreamSynchronize) X(_cudaStreamWaitEvent)                  \
    X(CuteDSLRT_Function_Run) X(CuteDSLRT_Module_Create_From_Bytes) X(CuteDSLRT_Module_Destroy)                       \
    X(CuteDSLRT_Module_Get_Function) X(CuteDSLRT_NvJaxCutlassCallExecute)                                             \
    X(CuteDSLRT_NvJaxCutlassCallExecuteNoCudaGraph) X(CuteDSLRT_NvJaxCutlassCallExecuteNoCudaGraph_v1)                \
    X(CuteDSLRT_NvJaxCutlassCallExecuteNoCudaGraph_v2) X(CuteDSLRT_NvJaxCutlassCallExecute_v1)                        \
    X(CuteDSLRT_NvJaxCutlassCallExecute_v2) X(CuteDSLRT_NvJaxCutlassCallInstantiate_v2)                               \
    X(CuteDSLRT_NvJaxCutlassCallPrepare) X(CuteDSLRT_NvJaxCutlassCallPrepare_v1)                                      \
    X(CuteDSLRT_NvJaxCutlassCallPrepare_v2) X(CuteDSLRT_NvJaxCutlassCallStateTypeId_v2)                               \
    X(CuteDSLRT_NvJaxCutlassCallStateTypeInfo_v2) X(CuteDSLRT_TVMFFISetRaisedCudaLaunchError)                         \
    X(cuda_dialect_assert_success) X(cuda_dialect_print_on_error)

#define EXPORT __attribute__((visibility("default")))

typedef int64_t (*dispatcher_t)(int32_t symbol, const uint64_t *arguments);

static dispatcher_t dispatcher = NULL;

#define AS_INDEX(name) INDEX_##name,
enum { HOST_SYMBOLS(AS_INDEX) AS_INDEX(cuda_dialect_init_library_once) SYMBOL_COUNT };

#define AS_STRING(name) #name,
static const char *const symbol_names[] = {HOST_SYMBOLS(AS_STRING) AS_STRING(cuda_dialect_init_library_once) NULL};

static int64_t dispatch(int32_t symbol, const uint64_t *arguments) {
    if (dispatcher == NULL) {
        fprintf(stderr, "bespoke host: %s called while no emulator is attached\n", symbol_names[symbol]);
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return dispatcher(symbol, arguments);
}

#define AS_FUNCTION(name)                                                                                             \
    EXPORT int64_t emulated_##name(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f,          \
                                   uint64_t g, uint64_t h, uint64_t i, uint64_t j, uint64_t k, uint64_t l) {          \
        const uint64_t arguments[12] = {a, b, c, d, e, f, g, h, i, j, k, l};                                          \
        return dispatch(INDEX_##name, arguments);                                                                     \
    }
HOST_SYMBOLS(AS_FUNCTION)

/* These three return text, for which there is one honest answer. */
EXPORT const char *emulated_cuda_dialect_get_error_name(int32_t error) {
    return error == 0 ? "cudaSuccess" : "an error of the emulated CUDA runtime";
}
EXPORT const char *emulated_CuteDSLRT_GetErrorName(int32_t error) {
    return emulated_cuda_dialect_get_error_name(error);
}
EXPORT const char *emulated_CuteDSLRT_GetErrorString(int32_t error) {
    return emulated_cuda_dialect_get_error_name(error);
}

/* Unloading happens when compiled code is torn down, maybe after Python: a library's handle simply stays. */
EXPORT void emulated_cuda_dialect_unload_library_once(uint64_t *state) { (void)state; }

/* A function compiled for TVM FFI tells its caller of an error through TVM FFI, whose functions for that it passes. */
#define RAISED_KIND "CUDADialectError"
#define RAISED_MESSAGE "CUDA Error Code: "

EXPORT void emulated_CuteDSLRT_TVMFFISetRaisedCudaError(void (*raise)(const char *, const char **, int32_t),
                                                        int32_t error) {
    char text[16];
    const char *parts[] = {RAISED_MESSAGE, text};
    snprintf(text, sizeof text, "%d", (int)error);
    raise(RAISED_KIND, parts, 2);
}

EXPORT int64_t emulated_cuda_dialect_init_library_once(uint64_t library, uint64_t init, uint64_t load,
                                                       void (*raise)(const char *, const char *)) {
    const uint64_t arguments[] = {library, init, load};
    const int64_t error = dispatch(INDEX_cuda_dialect_init_library_once, arguments);
    if (error != 0) {
        char message[48];
        snprintf(message, sizeof message, RAISED_MESSAGE "%d", (int)error);
        raise(RAISED_KIND, message);
    }
    return error;
}

/* The interface to host.py. */
EXPORT void bespoke_host_install(dispatcher_t function) { dispatcher = function; }
EXPORT int32_t bespoke_host_version(void) { return HOST_VERSION; }
EXPORT int32_t bespoke_host_symbol_count(void) { return SYMBOL_COUNT; }
EXPORT const char *bespoke_host_symbol_name(int32_t symbol) {
    return symbol >= 0 && symbol < SYMBOL_COUNT ? symbol_names[symbol] : NULL;
}
