# NVIDIA's image has an optimized torch, Transformer Engine and apex. Name one whose torch is 2.11 or later, which those
# up to 25.12 are not: docker build --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3 -t megatron_slm .
ARG BASE
FROM ${BASE}

WORKDIR /opt/megatron_slm
COPY pyproject.toml setup.py README.md LICENSE ./
COPY megatron_slm megatron_slm
COPY tools tools
COPY examples examples

# The constraints of the image keep its torch and Transformer Engine.
RUN pip install --no-cache-dir .[hopper]

WORKDIR /workspace
RUN python -c "import megatron.core, transformer_engine.pytorch, megatron_slm"
