"""The measurements of one GPU, in stages that run independently: see ``statefeed/bench/gpu.sh``."""
