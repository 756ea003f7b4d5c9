"""Change a part and see what the behaviour does: interventions, patching, edges, circuits."""
