"""popengine: Partition-guided Online Pruning (arXiv 2602.06822) in plain PyTorch.

Start reading at `models.pruning.partition`; start using at `popengine.engine.load`. Nothing is imported here, so that
importing a leaf such as `models.pruning.partition` never pulls in the engine.
"""

__version__ = "0.1.0"
