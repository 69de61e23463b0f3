"""`python -m flexattn_cuda.cli` and `torchrun -m flexattn_cuda.cli` are `flexattn`."""

from flexattn_cuda.cli import main

if __name__ == "__main__":
    main()
