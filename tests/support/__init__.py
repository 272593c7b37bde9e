"""What the cross-process tests share: processes, topologies, requests, comparison."""
