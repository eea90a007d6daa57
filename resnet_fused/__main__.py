"""`python -m resnet_fused train | bench | info`."""

from resnet_fused.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
