#!/bin/sh
# The interpreter of the private tree finds Cortex and its libraries there, and none of the host's.
unset PYTHONPATH PYTHONHOME
exec @TREE@/bin/python3 -P -m cortex "$@"
