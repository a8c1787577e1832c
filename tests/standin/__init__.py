"""A stand-in for the CUDA runtime under a CUDA build of torch, without a GPU: see README.md."""
