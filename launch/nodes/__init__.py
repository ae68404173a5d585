"""Do all nodes of a job reach each other and have the same job: ``trellis preflight``; errors of nodes."""
