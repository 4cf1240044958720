"""Stand-ins for the Pulumi plugins gcp, kubernetes and command, for networks where the official ones cannot
be had.

Each serves what a stack here uses, over the same protocol and with the same rules as the official plugin, and
refuses the rest by name. `values.py` is Pulumi's value model, `protocol.py` the gRPC side; a directory per
plugin has the rest.
"""
