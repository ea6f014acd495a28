"""What the documentation is made of beside its written pages: pages from the registries, and the runs behind them."""
