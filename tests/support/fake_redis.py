"""`python -m tests.support.fake_redis PORT`: stands in for a Redis server that is not there."""

import sys

from fakeredis import TcpFakeServer

if __name__ == "__main__":
    TcpFakeServer(("127.0.0.1", int(sys.argv[1])), server_type="redis").serve_forever()
