# cwdpo on NVIDIA GPUs, with the versions of tests/families:  docker build -f docker/gpu.Dockerfile -t cwdpo:gpu .
# PyPI's torch brings CUDA; the host needs its driver and the NVIDIA container toolkit only.
FROM python:3.11-slim
WORKDIR /src
COPY tests/families/constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0 torchvision==0.28.0
RUN pip install --no-cache-dir -c constraints.txt ".[vision,quant,bf16,video,captions]" num2words
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENV HF_HOME=/home/user/hub
ENTRYPOINT ["cwdpo"]
CMD ["--help"]
