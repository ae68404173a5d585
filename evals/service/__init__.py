"""The evaluation service: a queue behind HTTP, its workers, and a web page.

It answers on loopback; any other address needs a token. Clients name runs by id and tasks by name, both from
what the service itself lists, and send no paths and no settings: those come from the run's own recipe.
"""

from evals.service.app import create_app
from evals.service.background import Background
from evals.service.server import serve

__all__ = ["Background", "create_app", "serve"]
