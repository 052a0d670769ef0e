import socket


def get_ip() -> str:
    """The address of this machine in its network, or 127.0.0.1 without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: for documents. No packet is sent.
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def get_open_port() -> int:
    """A TCP port that was free when it was asked for."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
