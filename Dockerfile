# docker build -t cosup .
# docker run --stop-timeout 40 -p 8000:8000 -v MODEL:/model:ro -v INDEX:/index -v KEYS:/keys:ro cosup
# The process is user 10001: INDEX has to be writable and KEYS/keys.json readable by it (chown 10001).
FROM python:3.12-slim
WORKDIR /app
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve,milvus]' && useradd --create-home --uid 10001 cosup
USER cosup
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["cosup", "serve", "--host", "0.0.0.0"]
CMD ["--model", "/model", "--index", "/index", "--keys", "/keys/keys.json"]
