"""The code that an exported pipeline's folder holds: plain torch and diffusers, nothing of ours. Copied, never imported here.

pipeline.py, with noise.py within it, is every folder's; beside its weights lies cmt_dit.py, cmt_edm.py or cmt_edm2.py, whichever
has the network. Each file stands alone, so what the networks' files share stands in all of them; a test holds them equal.
"""
