"""Pure tensor algebra shared by oracles; knows no Pyro, no random state, no printing."""
