// Steps through the decoding of one sample. Position i shows its token from step unmasked_at[i] + 1 on. At step 0 nothing is decoded.
(() => {
  "use strict";
  const models = JSON.parse(document.getElementById("decoding-data").textContent);
  const at = (name) => document.getElementById("viewer-" + name);
  if (!models.length || !at("model")) return;
  const SECONDS = 8; // playing from start to end takes about this long, for any number of steps
  let step = 0, spans = [], timer = null;

  const model = () => models[at("model").value];
  const sample = () => model().samples[at("sample").value];

  const option = (select, value, text) => select.append(new Option(text, value));
  models.forEach((m, i) => option(at("model"), i, m.title));
  models[0].samples.forEach((s, i) => option(at("sample"), i, String(s.index + 1)));
  at("model").value = models.length - 1; // models are ordered from worst to best

  // One element for each position, as wide as its token will be, so that the text does not move while it fills.
  const layOut = () => {
    spans = sample().tokens.map((token, i) => {
      const span = document.createElement("span");
      span.dataset.position = i;
      const text = written(token);
      span.style.setProperty("--width", Math.max([...text].length, 1) + "ch");
      if (token !== null && /^\s/.test(token)) span.dataset.word = "";
      return span;
    });
    at("tokens").replaceChildren(...spans.flatMap((span) => ("word" in span.dataset ? [" ", span] : [span])));
    at("step").max = model().decode_steps;
    show(0);
  };
  const written = (token) => (token === null ? "\u220e" : token.replace(/\n/g, "\u21b5").trim() || "\u2423");

  const show = (to) => {
    step = Math.min(Math.max(to, 0), model().decode_steps);
    const { tokens, unmasked_at } = sample();
    let shown = 0, fresh = 0;
    spans.forEach((span, i) => {
      const there = unmasked_at[i] < step, now = there && step > 0 && unmasked_at[i] === step - 1;
      shown += there;
      fresh += now;
      span.textContent = there ? written(tokens[i]) : "";
      span.className = "token" + (there ? "" : " masked") + (now ? " new" : "") + (there && tokens[i] === null ? " end" : "");
    });
    at("step").value = step;
    const change = step === 0 ? "before the first step" : `${fresh} unmasked in this step`;
    at("step").setAttribute("aria-valuetext", `step ${step} of ${model().decode_steps}`);
    at("status").textContent = `Step ${step} of ${model().decode_steps}: ${change}, ${shown} of ${tokens.length} tokens shown.` + verdict();
    at("first").disabled = at("previous").disabled = step === 0;
    at("last").disabled = at("next").disabled = step === model().decode_steps;
  };
  const verdict = () => {
    const { valid, fault } = sample();
    return step < model().decode_steps || valid === null ? "" : valid ? " A valid document." : ` Not valid: ${fault}.`;
  };

  const play = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => (step < model().decode_steps ? show(step + 1) : play(false)), Math.max(60, Math.min(700, (1000 * SECONDS) / model().decode_steps))) : null;
    at("play").textContent = on ? "\u275A\u275A Pause" : "\u25B8 Play";
  };
  const go = (to) => {
    play(false);
    show(to);
  };

  at("model").addEventListener("change", () => { play(false); layOut(); });
  at("sample").addEventListener("change", () => { play(false); layOut(); });
  at("first").addEventListener("click", () => go(0));
  at("previous").addEventListener("click", () => go(step - 1));
  at("next").addEventListener("click", () => go(step + 1));
  at("last").addEventListener("click", () => go(model().decode_steps));
  at("step").addEventListener("input", (event) => go(Number(event.target.value)));
  at("play").addEventListener("click", () => {
    if (timer === null && step === model().decode_steps) show(0);
    play(timer === null);
  });
  // The arrow keys step if the viewer or nothing is focused. Lists and the slider use the keys themselves.
  document.addEventListener("keydown", (event) => {
    const inside = event.target === document.body || document.getElementById("viewer").contains(event.target);
    if (!inside || /^(SELECT|INPUT)$/.test(event.target.tagName) || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) {
      event.preventDefault();
      go(step + by);
    }
  });
  layOut();
})();
