"""What a run shows of itself: TensorBoard events and Prometheus metrics."""
