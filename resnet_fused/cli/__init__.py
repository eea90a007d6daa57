"""The command line: `python -m resnet_fused train | bench | info`. Nothing here is imported by the library itself."""
