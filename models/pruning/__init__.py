"""The two pruning methods: settings, partitions of channels, rules, and Prefill-Only Pruning."""
