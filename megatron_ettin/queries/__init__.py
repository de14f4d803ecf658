"""Questions about what a run has seen and will see, answered from its order and its ledger."""
