# cwdpo on a CPU, with the versions that it is tested with:  docker build -f docker/cpu.Dockerfile -t cwdpo:cpu .
FROM python:3.11-slim
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
RUN pip install --no-cache-dir -c constraints.txt ".[server,captions,video]"
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENV HF_HOME=/home/user/hub
ENTRYPOINT ["cwdpo"]
CMD ["--help"]
