"use strict";
fetch("/openapi.json").then((response) => response.json()).then((api) => {
  for (const [path, operations] of Object.entries(api.paths)) for (const [method, operation] of Object.entries(operations)) {
    const title = document.createElement("h2"), text = document.createElement("p"), details = document.createElement("details");
    title.textContent = `${method.toUpperCase()} ${path}`;
    text.textContent = operation.description ?? "";
    const summary = document.createElement("summary"), schema = document.createElement("pre");
    summary.textContent = "Body and answers";
    schema.textContent = JSON.stringify({ requestBody: operation.requestBody, responses: operation.responses }, null, 2);
    details.append(summary, schema);
    document.getElementById("operations").append(title, text, details);
  }
});
