"""An OpenAI-compatible server that streams cited answers, and a page to ask it. Needs the extra `serve`."""

from importlib.util import find_spec

from cosup.config import UserError

for _name in ("fastapi", "prometheus_client", "uvicorn"):
    if find_spec(_name) is None:
        raise UserError(f"serving needs {_name}: install it with `pip install 'cosup[serve]'`")

from cosup.serve.app import create_app  # noqa: E402
from cosup.serve.keys import Keys, add_key  # noqa: E402
from cosup.serve.limits import Limits  # noqa: E402
from cosup.serve.run import serve  # noqa: E402
from cosup.serve.worker import Worker  # noqa: E402

__all__ = ["Keys", "Limits", "Worker", "add_key", "create_app", "serve"]
