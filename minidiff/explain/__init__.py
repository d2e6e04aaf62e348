"""What notebooks and `minidiff samplers` need to explain diffusion; no pipeline uses any of it.

Reading order: `gaussian.py` (data for which everything is known in closed form), `samplers.py` (the table of
all samplers), `convergence.py` (how fast each of them comes near the exact solution).
"""
