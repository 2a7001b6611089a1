"""What third parties test with: the conformance kit and tiny models."""
