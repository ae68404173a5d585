"""The parity matrix: every mesh and engine must train as one process does, in CI and on a user's cluster.

A case (``cases``) is one row. Its reference (``reference``) is one process, plain torch and the whole batch;
``run`` trains the case on the ranks that are there and compares loss, gradient norm and every parameter's
gradient at every step. ``operation`` compares state passing bit by bit, ``stress`` the transfers' order.
"""
