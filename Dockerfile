# docker build -t selfsteer .
# docker run --rm --user "$(id -u)" -v "$PWD:/work" selfsteer run demo
FROM python:3.11-slim
COPY pyproject.toml README.md LICENSE constraints.txt /selfsteer/
COPY src /selfsteer/src
RUN pip install --no-cache-dir --constraint /selfsteer/constraints.txt '/selfsteer[view]'
# any user may run it, and what it caches stays in the mounted folder
ENV HOME=/tmp USER=selfsteer HF_HOME=/work/.cache/huggingface SELFSTEER_CACHE=/work/.cache/selfsteer
WORKDIR /work
ENTRYPOINT ["selfsteer"]
