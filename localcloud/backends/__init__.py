"""The real parts behind localcloud: supervised processes, a registry, control planes, instances."""
