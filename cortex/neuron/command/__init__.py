"""External engines: other people's servers, started from a command and spoken to over HTTP."""
