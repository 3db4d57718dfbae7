"""Where adapters go: architectures, and the selection of their modules. No torch."""
