"use strict";
const root = document.documentElement;
root.classList.add("js");

for (const fieldset of document.querySelectorAll("fieldset.choice")) {
  const groups = document.querySelectorAll(`[data-group="${fieldset.dataset.for}"]`);
  fieldset.hidden = false;
  fieldset.addEventListener("change", (event) => {
    groups.forEach((group, number) => group.toggleAttribute("data-chosen", number === Number(event.target.value)));
  });
}

const button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const label = () => (button.textContent = isDark() ? "Light" : "Dark");
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  label();
});
system.addEventListener("change", label);
label();

const download = document.getElementById("download");
download.hidden = false;
download.addEventListener("click", () => {
  const text = document.getElementById("numbers").textContent;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
