"""How the gateway and the runners speak: numbers as bytes with their shape and dtype, on sockets and between hosts.

BentoML's own way to a runner is pickle, which runs code in whoever reads it. It is not used here, on any port.
"""
