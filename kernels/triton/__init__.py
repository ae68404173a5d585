"""The compress operation as Triton kernels; ``kernels.triton.compress`` needs triton to be imported."""
