"""CMT-Fast: consistency mid-training (Hu, Lai, Mitsufuji, Ermon; arXiv 2509.24526) as a trainer.

Three stages turn a diffusion model into a one- or two-step generator: pre-training, mid-training on
the teacher's ODE trajectories, post-training as a flow map. `cmt train` runs them; loop.py is the path.
"""

__version__ = "0.1.0"
