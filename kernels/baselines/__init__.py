"""The recurrences Trellis is measured against: one file each, plain PyTorch, chunkwise and differentiable.

Every file has one public function of the form `grid.Operation`: the same arguments and results, so that one
mixer base class, one way to pass states between ranks and one test drive them all.
"""
