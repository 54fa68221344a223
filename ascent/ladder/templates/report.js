"use strict";
(() => {
  const { items, stages } = JSON.parse(document.getElementById("items").textContent);
  const element = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const shown = (value) => {
    if (value === undefined) return "\u2013";
    if (value === null) return "not stated";
    if (value === true) return "yes";
    if (value === false) return "no";
    if (typeof value === "number") return String(Number(value.toPrecision(6)));
    if (Array.isArray(value)) return value.map(shown).join(", ") || "none";
    return typeof value === "object" ? JSON.stringify(value) : value;
  };
  const question = (input) => {
    const entries = Object.entries(input).filter(([, value]) => value !== null);
    const quote = element("blockquote");
    quote.textContent = entries.length === 1 ? shown(entries[0][1])
      : entries.map(([key, value]) => key + ": " + shown(value)).join("\n");
    return quote;
  };
  const table = (item, names) => {
    const answers = names.map((name) => item.answers[name]);
    const keys = new Set(Object.keys(item.expected || {}));
    answers.forEach((answer) => Object.keys((answer && answer.output) || {}).forEach((key) => keys.add(key)));
    const body = element("tbody");
    keys.forEach((key) => {
      const row = body.appendChild(element("tr"));
      row.appendChild(element("th", key)).scope = "row";
      if (item.expected) row.append(element("td", shown(item.expected[key]), "cell"));
      answers.forEach((answer) => {
        const output = answer && answer.output;
        const wrong = output && answer.differs.includes(key);
        row.append(element("td", output ? shown(output[key]) : "\u2013", wrong ? "cell wrong" : "cell"));
      });
    });
    const head = element("tr");
    [" ", ...(item.expected ? ["expected"] : []), ...names].forEach((text) => {
      head.appendChild(element("th", text)).scope = "col";
    });
    const whole = element("table");
    whole.append(element("thead"), body);
    whole.tHead.append(head);
    const scroll = element("div", undefined, "scroll");
    scroll.append(whole);
    return scroll;
  };
  const show = (button) => {
    const panel = document.getElementById("detail-" + button.dataset.stage);
    const item = items[button.dataset.item];
    const names = [stages[button.dataset.stage], button.dataset.stage].filter((name) => name && item.answers[name]);
    const close = element("button", "Close", "close");
    close.type = "button";
    close.addEventListener("click", () => hide(panel, button));
    panel.replaceChildren(close, element("h3", button.dataset.item), question(item.input), table(item, names));
    names.forEach((name) => {
      const answer = item.answers[name];
      if (answer.output && !answer.error) return;
      panel.append(element("p", name + " answered without a structured output:", "small muted"));
      panel.append(element("pre", answer.error || answer.text));
    });
    const raw = element("details");
    raw.append(element("summary", "What the models wrote", "small"));
    names.forEach((name) => raw.append(element("p", name, "small muted"), element("pre", item.answers[name].text)));
    panel.append(raw);
    document.querySelectorAll("button[data-item]").forEach((other) => {
      if (other.dataset.stage === button.dataset.stage) other.setAttribute("aria-pressed", String(other === button));
    });
    panel.hidden = false;
  };
  const hide = (panel, button) => {
    panel.hidden = true;
    button.setAttribute("aria-pressed", "false");
    button.focus();
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-item]");
    if (button) show(button);
  });
})();
