"use strict";
// Whatever comes from models, users and passages is put into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const KEPT = "cosup-history";
const COMMON = new Set("and are but for from had has have her his its not that the their this was were which who with".split(" "));
let running = null;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function headers() {
  const sent = { "content-type": "application/json" };
  if ($("key").value) sent.authorization = `Bearer ${$("key").value}`;
  return sent;
}

function fail(message) { $("error").textContent = message; $("error").hidden = false; }

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

function draw(answer) {
  const characters = [...answer.text]; // the server counts characters, not UTF-16 units
  const stops = [
    ...answer.citations.map((c, i) => ({ at: c.end_index, node: citeButton(c, i, characters) })),
    ...answer.retrievals.map((r) => ({ at: r.position, node: retrievalMark(r) })),
  ].sort((a, b) => a.at - b.at);
  $("answer").replaceChildren();
  let from = 0;
  for (const { at, node } of stops) {
    $("answer").append(characters.slice(from, at).join(""), node);
    from = Math.max(from, at);
  }
  $("answer").append(characters.slice(from).join(""));
}

function citeButton(citation, i, characters) {
  const button = element("button", `${i + 1}`, "cite");
  button.setAttribute("aria-label", `Citation ${i + 1}: ${citation.title || citation.passage_id}`);
  const claim = characters.slice(citation.start_index, citation.end_index).join("");
  button.addEventListener("click", () => open(citation.passage_id, claim));
  return button;
}

function retrievalMark(retrieval) {
  const mark = element("span", retrieval.found ? "searched" : "found nothing", "ret");
  mark.title = retrieval.found ? "The model retrieved here" : "The model looked here and found nothing good enough";
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", mark.title);
  return mark;
}

async function open(id, claim) {
  try {
    const response = await checked(await fetch(`/v1/passages/${encodeURIComponent(id)}`, { headers: headers() }));
    const passage = await response.json();
    $("title").textContent = passage.title || passage.id;
    const telling = (word) => (word.length > 2 && !COMMON.has(word)) || /\p{N}/u.test(word);
    const words = new Set((claim.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []).filter(telling));
    const pieces = passage.text.split(/([\p{L}\p{N}]+)/u);
    $("text").replaceChildren(...pieces.map((piece) => words.has(piece.toLowerCase()) ? element("mark", piece) : piece));
    $("source").replaceChildren();
    if (typeof passage.meta.url === "string" && /^https?:\/\//.test(passage.meta.url)) {
      const link = element("a", passage.meta.url);
      link.href = passage.meta.url;
      link.rel = "noreferrer noopener";
      $("source").append(link);
    }
    $("passage").showModal();
  } catch (error) { fail(error.message); }
}

function drawCandidates(answer) {
  $("retrievals").hidden = !answer.retrievals.length;
  $("candidates").replaceChildren(...answer.retrievals.flatMap((retrieval, i) => {
    const title = element("h3", `Search ${i + 1}${retrieval.found ? "" : ", which found nothing good enough"}`);
    const list = element("ol");
    for (const found of retrieval.candidates) {
      const item = element("li"), button = element("button", found.title || found.id, "link");
      button.type = "button";
      button.addEventListener("click", () => open(found.id, answer.text));
      item.append(button, element("span", ` ${found.score.toFixed(3)}`, "score"));
      list.append(item);
    }
    return [title, list];
  }));
}

async function ask(question) {
  const answer = { question, text: "", citations: [], retrievals: [] };
  const body = {
    model: (await (await checked(await fetch("/v1/models", { headers: headers() }))).json()).data[0].id,
    messages: [{ role: "user", content: question }],
    stream: true,
    max_tokens: Number($("max_tokens").value),
    temperature: Number($("temperature").value),
    cosup: { events: true, max_retrievals: Number($("max_retrievals").value), retrieve_first: $("retrieve_first").checked },
  };
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal };
  const response = await checked(await fetch("/v1/chat/completions", options));
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.cosup) answer.retrievals.push(chunk.cosup);
    const delta = chunk.choices[0]?.delta ?? {};
    answer.reason = chunk.choices[0]?.finish_reason ?? answer.reason;
    answer.text += delta.content ?? "";
    answer.citations.push(...(delta.annotations ?? []).map((note) => note.url_citation));
    draw(answer);
    $("answer").hidden = false;
    if (chunk.cosup) drawCandidates(answer);
  }
  return answer;
}

function kept() { try { return JSON.parse(localStorage.getItem(KEPT)) ?? []; } catch { return []; } }

function drawHistory() {
  $("past").hidden = !kept().length;
  $("history").replaceChildren(...kept().map((answer) => {
    const item = element("li"), button = element("button", answer.question, "link");
    button.type = "button";
    button.addEventListener("click", () => {
      $("question").value = answer.question;
      $("answer").hidden = false;
      draw(answer);
      drawCandidates(answer);
    });
    item.append(button);
    return item;
  }));
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  $("error").hidden = true;
  $("stop").hidden = false;
  $("answer").hidden = $("retrievals").hidden = true;
  $("status").textContent = "Answering…";
  try {
    const answer = await ask($("question").value);
    localStorage.setItem(KEPT, JSON.stringify([answer, ...kept()].slice(0, 50)));
    drawHistory();
    const count = answer.citations.length;
    const end = answer.reason === "length" ? "; it was cut at the limit of tokens" : "";
    $("status").textContent = `Answered with ${count || "no"} ${count === 1 ? "citation" : "citations"}${end}.`;
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    running = null;
    $("stop").hidden = true;
  }
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("close").addEventListener("click", () => $("passage").close());
$("forget").addEventListener("click", () => { localStorage.removeItem(KEPT); drawHistory(); });
drawHistory();
