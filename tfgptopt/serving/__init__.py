"""An HTTP server over an exported file, with OpenAI's interface. Needs the extra `server`."""

from tfgptopt.serving.app import create_app
from tfgptopt.serving.limits import Limits

__all__ = ["Limits", "create_app"]
