"""Which cluster RAY_ADDRESS means, and whether it answers: asked first, as Ray itself waits for minutes in silence."""

import os
import re

from libra_ray.on_ray.ray_private import local_cluster, read_settings_again, user_token, version_of_cluster

A_CLUSTER = "give auto (on a machine of the cluster) or HOST:PORT such as 10.0.0.1:6379"
VALID = f"{A_CLUSTER}, or unset RAY_ADDRESS for a Ray of this program's own"
ANSWER_S = 15.0
"""A cluster that does not answer for so long is gone."""
_HOST_AND_PORT = re.compile(r"([^\s:/@]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


def wanted() -> str:
    """What RAY_ADDRESS says; empty where it asks for no cluster but one of this program's own."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def reachable(address: str) -> str:
    """HOST:PORT of the cluster that RAY_ADDRESS names, which has answered and takes this program's token.

    Where RAY_AUTH_MODE is unset it is set as the cluster needs it: Ray would send the token in the home folder to a local
    cluster that asks for none, and fail by that. To HOST:PORT a token is sent only where the user says so, as Ray has it.

    Raises:
        ValueError: it is no address of a cluster.
        RuntimeError: no cluster answers there, or one of another version, or it asks for another token.
    """
    place = _found(address)
    where = f"RAY_ADDRESS={address!r}" + ("" if place == address else f" (that is {place})")
    asks = asks_for_token(where, place, "")
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if not mode:
        _set_auth_mode("token" if asks and address == "auto" and user_token() else "disabled")
    elif mode == "token" and not asks:
        raise RuntimeError(f"{where} asks for no token, but RAY_AUTH_MODE=token; unset RAY_AUTH_MODE")
    token = user_token() if asks else ""
    if asks and (os.environ["RAY_AUTH_MODE"].lower() != "token" or not token or asks_for_token(where, place, token)):
        raise RuntimeError(
            f"{where} asks for the token of its head; export RAY_AUTH_MODE=token, with that token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        )
    return place


def _found(address: str) -> str:
    if address != "auto":
        if not _HOST_AND_PORT.fullmatch(address):
            hint = " (a job server's belongs into RAY_API_SERVER_ADDRESS)" if address.startswith("http") else ""
            raise ValueError(f"RAY_ADDRESS={address!r} is not the address of a cluster{hint}; {VALID}")
        return address
    try:
        return local_cluster()
    except ConnectionError:
        raise RuntimeError(f"RAY_ADDRESS='auto', but no Ray runs on this machine; {VALID}") from None


def asks_for_token(where: str, place: str, token: str) -> bool:
    """Whether the cluster refuses the token, or, where that is empty, to answer without one.

    Args:
        where: the cluster as the user knows it, for the message.
        place: its HOST:PORT.
        token: to show.

    Raises:
        RuntimeError: no cluster answers there, or one of another version.
    """
    import grpc
    import ray

    try:
        version = version_of_cluster(place, token, ANSWER_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return True
        raise RuntimeError(f"no Ray cluster answers at {where}: {error.details()}; {VALID}") from None
    if version != ray.__version__:
        raise RuntimeError(f"{where} runs Ray {version}, this environment has {ray.__version__}; install the same")
    return False


def _set_auth_mode(mode: str) -> None:
    os.environ["RAY_AUTH_MODE"] = mode
    read_settings_again()
