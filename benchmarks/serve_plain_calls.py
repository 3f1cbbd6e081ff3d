"""The application with a gateway that calls its levels as Serve's environment says, for `benchmarks/serve_means.py`."""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from ray import serve
from ray.serve import Application

from libra_ray.on_ray.serving import app as served


class PlainGateway(served.GatewayBase):
    """Its calls go by the handles as Serve gives them."""

    _way = staticmethod(lambda handle: handle)


Gateway = serve.ingress()(PlainGateway)


def app(arguments: Mapping[str, Any]) -> Application:
    """As `serve_apps.libra:app`."""
    from serve_apps.libra import app

    with patch.object(served, "Gateway", Gateway):
        return app(arguments)
