"""The other process of the measured transport: answers every message with one of a given size.

python -m libra_ray.budget.echo BYTES
"""

import sys
from threading import Thread

from websockets.sync.server import ServerConnection, serve


def main() -> None:
    """Serve on a free port of this machine, which standard output says, until standard input ends."""
    reply = bytes(int(sys.argv[1]))

    def answer(connection: ServerConnection) -> None:
        for _ in connection:
            connection.send(reply)

    with serve(answer, "127.0.0.1", 0, max_size=None, compression=None) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        sys.stdout.write(f"{server.socket.getsockname()[1]}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
