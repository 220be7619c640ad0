"""An emulator that runs the Hopper kernels' own source without a GPU, with the chip's asynchrony made hostile: docs/emulator.md."""
