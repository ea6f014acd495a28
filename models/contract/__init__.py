"""What every entry of the zoo promises: batches, options, capabilities, the registry."""
