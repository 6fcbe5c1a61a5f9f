"""Stand in for ais_bench: its input, padding, naming, summary and permission rules, over ONNX Runtime."""
