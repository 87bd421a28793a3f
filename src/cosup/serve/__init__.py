"""An OpenAI-compatible server that streams cited answers, and a page to ask it. Needs the extra `serve`."""

from cosup.config import UserError

try:
    import fastapi as _fastapi
    import prometheus_client as _prometheus_client
    import uvicorn as _uvicorn
except ModuleNotFoundError as e:
    raise UserError(f"serving needs {e.name}: install it with `pip install 'cosup[serve]'`") from None

from cosup.serve.app import create_app
from cosup.serve.keys import Keys, add_key
from cosup.serve.limits import Limits
from cosup.serve.run import serve
from cosup.serve.worker import Worker

__all__ = ["Keys", "Limits", "Worker", "add_key", "create_app", "serve"]
