"""The gate in other libraries' trainers. Each module needs its library: ``pip install 'avalanche-sp[huggingface]'``."""
