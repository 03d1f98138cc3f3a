"use strict";
// Each walk holds its steps as JSON; a step names what to show and what to say. Without this script, and in print,
// the strip of frames stands in for the slider.
document.documentElement.classList.add("js");
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((e) => { e.open = true; }));
for (const walk of document.querySelectorAll("[data-steps]")) {
  const steps = JSON.parse(walk.dataset.steps);
  const part = (name) => walk.querySelector(`[data-part=${name}]`);
  const slider = part("slider"), marker = part("marker");
  const show = () => {
    const step = steps[Number(slider.value)];
    part("frame").setAttribute("viewBox", step.frame);
    part("frame").setAttribute("aria-label", step.alt);
    part("change").setAttribute("viewBox", step.change);
    part("change").setAttribute("aria-label", step.changeAlt);
    marker.setAttribute("cx", step.mark[0]);
    marker.setAttribute("cy", step.mark[1]);
    part("state").textContent = step.state;
    slider.setAttribute("aria-valuetext", step.state);
  };
  slider.addEventListener("input", show);
  show(); // a browser may restore the slider's place when the page is loaded again
}
