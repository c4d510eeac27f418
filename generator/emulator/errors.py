"""What the emulator raises. Every message says where: PTX line, CTA, warp, lane, address, and what to do about it."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Base of everything the emulator raises on purpose."""


class PtxSyntaxError(EmulatorError):
    """The PTX text cannot be parsed (cut off, unbalanced, undeclared name)."""


class UnsupportedInstruction(EmulatorError):
    """An opcode, modifier, operand form or tensor-map bit that the emulator does not know. Nothing is skipped
    silently.
    """


class LaunchError(EmulatorError):
    """A launch outside the limits of the architecture, or with parameters that do not match the kernel."""


class Hazard(EmulatorError):
    """The program did something silicon may hide: an uninitialized, out-of-bounds, misaligned or unsynchronized
    access.
    """


class Deadlock(EmulatorError):
    """Nothing can run and nothing asynchronous is under way; the message lists who waits for what."""


class HostError(EmulatorError):
    """The host function asked for something that the emulated CUDA runtime does not offer or must refuse."""
