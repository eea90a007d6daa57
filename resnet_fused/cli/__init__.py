"""The command line: `resnet-fused`, or `python -m resnet_fused`. Nothing here is imported by the library itself."""
