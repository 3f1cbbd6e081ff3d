"""The wire format and a light client: numpy, msgpack, websockets, pillow."""
